"""How the embedded emoji base is made."""
