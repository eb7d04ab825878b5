"""`python -m neo.config`: print the reference of all config fields as Markdown."""

from neo.config.render import reference

if __name__ == "__main__":
    print(reference())
