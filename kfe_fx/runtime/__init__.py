"""Running a Program elsewhere: ONNX files, ONNX Runtime sessions, latency, and proof of equal outputs."""
