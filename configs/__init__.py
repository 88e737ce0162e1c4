"""The shipped recipes: one readable YAML each, which `xdlm-image VERB --config NAME` finds by name."""
