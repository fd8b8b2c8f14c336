"""Rows → conversations and preferences, whatever their columns are called."""
