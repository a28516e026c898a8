"""Models for use without this package: ONNX, torch.export, plain weights, int8 and Triton, each compared with the
checkpoint before it is written."""
