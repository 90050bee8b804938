"""Savings, figures and the HTML page."""
