"""The site: its settings for Sphinx, and the programs that write its generated pages."""
