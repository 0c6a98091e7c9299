"""Run the command line: `python -m minissl`."""

from minissl.cli import console

if __name__ == "__main__":
    console()
