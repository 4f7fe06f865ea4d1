"""The sources of captioned pictures, one module each."""
