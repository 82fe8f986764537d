"""What processors compute instead of PyTorch's and peft's own products; `door` is the one way in and out."""
