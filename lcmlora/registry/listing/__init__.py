"""Listing many versions of many models: the database searches, in pages, and nothing is asked for each of them."""
