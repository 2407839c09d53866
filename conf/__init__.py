"""The YAML configs; a package, so that an installed wheel has them too."""
