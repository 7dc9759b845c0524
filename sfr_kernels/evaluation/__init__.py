"""What training changed: losses on held-out prompts, answers to prompts, and programs that pass tests."""
