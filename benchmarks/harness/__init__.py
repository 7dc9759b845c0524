"""What is measured, and how: cases, work, the race of providers, and the run of all of them."""
