"""`python -m foldlog` runs the command line."""

from foldlog.cli import main

if __name__ == "__main__":
    main(prog_name="foldlog")
