"""The program as ``python -m almlip_jax.cli``."""

from almlip_jax.__main__ import main

if __name__ == "__main__":
    main()
