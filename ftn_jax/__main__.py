"""`python -m ftn_jax`: the command-line tool `ftn`."""

import sys


def main() -> None:
    """Run `ftn` and exit with its code."""
    try:
        from ftn_jax import tool
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
        sys.exit("ftn needs tyro: pip install 'ftn_jax[experiments]'")
    sys.exit(tool.main())


if __name__ == "__main__":
    main()
