"""Whether torch's newer exporter is ready to take over."""

import numpy as np
import pytest
import torch

from florence2 import Florence2
from florence2.export.graphs.parts import model_parts
from florence2.lite.layout import CROSS


@pytest.mark.filterwarnings("ignore")  # of torch.export and onnxscript
def test_torchs_newer_exporter_takes_a_part(nano: Florence2) -> None:
    """`trace_part` uses the older one, which is ten times as fast and needs onnx alone; torch says it will go."""
    pytest.importorskip("onnxscript")
    import onnxruntime

    part = model_parts(nano.model, 192, 192)[CROSS]
    dynamic = dict.fromkeys(part.dims["encoder_hidden_states"], torch.export.Dim.DYNAMIC)
    program = torch.onnx.export(
        part.module,
        tuple(part.inputs.values()),
        input_names=list(part.inputs),
        output_names=part.outputs,
        dynamic_shapes=(dynamic,),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    memory = torch.randn(3, 11, 160, generator=torch.Generator().manual_seed(0))
    keys = session.run(None, {session.get_inputs()[0].name: memory.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(keys, part.module(memory)[0].numpy(), atol=1e-5)
