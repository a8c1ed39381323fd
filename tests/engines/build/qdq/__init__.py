"""Tests of TensorRT engine builds."""
