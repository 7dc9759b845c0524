"""What training changed: losses on held-out prompts, and answers to them."""
