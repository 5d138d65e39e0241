"""`python -m clipfit`."""

from clipfit.cli import main

if __name__ == "__main__":
    main()
