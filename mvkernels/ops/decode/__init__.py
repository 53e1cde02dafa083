"""Tree decode and KV append: tasks, tables and the kernels of every backend."""
