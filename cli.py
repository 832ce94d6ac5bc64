"""For a checkout that is not installed: `python cli.py serve …`."""

from luna_mp.cli import main

if __name__ == "__main__":
    main()
