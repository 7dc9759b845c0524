"""What training changed: losses on held-out prompts, and the answers to them."""
