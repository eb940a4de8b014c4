"""What needs a GPU: one command a step, each under eight minutes, see README.md here."""
