"""How fast a recipe trains, beside other settings and other tools."""
