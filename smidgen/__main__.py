"""`python -m smidgen`."""

from smidgen.cli import run

if __name__ == "__main__":
    run()
