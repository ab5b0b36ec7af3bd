"""Programs that train and evaluate what the paper compares, and gather the results in its tables
and figures."""
