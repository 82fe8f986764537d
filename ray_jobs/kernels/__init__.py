"""What processors compute in place of the products of PyTorch and peft; `door` is the only interface to it."""
