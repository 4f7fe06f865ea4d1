"""What is checked before a bundle is released: that plain diffusers draws with its files as the trained student did."""
