"""The weights that ship with the package: one ``<name>.safetensors`` and one ``<name>.json`` card each.

The folder is installed as ``gmn_optim.pretrained``; it is a package so that an editable install finds it too.
"""
