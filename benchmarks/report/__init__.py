"""What is made of result files: tables, plots, comparisons, README."""
