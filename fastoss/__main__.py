"""`python -m fastoss` is the `fastoss` command; torchrun starts its workers this way."""

from fastoss.cli import main

if __name__ == "__main__":
    main()
