"""`python -m lcmlora`, the same as `lcmlora`."""

from lcmlora.cli.main import main

if __name__ == "__main__":
    main()
