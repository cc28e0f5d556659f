"""Run the command line as ``python -m prox24_deploy``."""

from prox24_deploy.cli import main

if __name__ == "__main__":
    main()
