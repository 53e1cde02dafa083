"""Branch-masked attention: schema, plans, tables and the kernels of every backend."""
