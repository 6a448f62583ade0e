"""Data sets that ship with the package; ``NOTICE.md`` has their licence and how each file was made."""
