"""What people use instead."""
