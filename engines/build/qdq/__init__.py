"""FP8 and INT8 for TensorRT: graphs with QuantizeLinear and DequantizeLinear around the layers of the UNet."""
