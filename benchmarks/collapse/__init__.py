"""Does SFR help? Two experiments with controls; README.md says what they show."""
