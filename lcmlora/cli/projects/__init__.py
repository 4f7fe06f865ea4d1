"""Verbs that make a project, or write its generated files anew."""
