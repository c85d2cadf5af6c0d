"""A tiny model for mlserver: y = x · W for rows of four numbers, and texts turned round."""

import numpy as np  # type: ignore[import-not-found]
from mlserver import MLModel, types  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec, StringCodec  # type: ignore[import-not-found]

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) / 4


class Linear(MLModel):  # type: ignore[misc]
    """Answers the tensor ``x`` with ``y``, the texts ``s`` with ``reversed``."""

    async def predict(self, payload: types.InferenceRequest) -> types.InferenceResponse:
        """Run one inference."""
        outputs = []
        for tensor in payload.inputs:
            if tensor.name == "s":
                texts = [text[::-1] for text in StringCodec.decode_input(tensor)]
                outputs.append(StringCodec.encode_output("reversed", texts))
            else:
                rows = NumpyCodec.decode_input(tensor).astype(np.float32)
                outputs.append(NumpyCodec.encode_output("y", rows @ WEIGHTS))
        return types.InferenceResponse(model_name=self.name, outputs=outputs, id=payload.id)
