"""Commands of main.py."""
