"""Files and hubs → rows that know where they stand."""
