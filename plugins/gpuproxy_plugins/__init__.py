"""The protocol plugins that come with gpuproxy; each enters through the registry like any other."""
