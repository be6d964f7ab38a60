"""What TensorBoard's page of hyperparameters is made of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

PLUGIN = "hparams"


def experiment(hparams: Mapping[str, Any], metrics: Iterable[str]) -> Any:
    """The table's columns: hyperparameters, and metrics by the tags of their scalars."""
    from tensorboardX.proto.api_pb2 import Experiment, HParamInfo, MetricInfo, MetricName
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    infos = [HParamInfo(name=name, type=_type_of(value)) for name, value in hparams.items()]
    columns = [MetricInfo(name=MetricName(tag=tag)) for tag in metrics]
    content = Experiment(hparam_infos=infos, metric_infos=columns)
    return _summary("experiment", HParamsPluginData(experiment=content, version=0))


def session_start(hparams: Mapping[str, Any]) -> Any:
    """The values of this run's hyperparameters."""
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo

    start = SessionStartInfo(start_time_secs=time.time())
    for name, value in hparams.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, (int, float)):
            start.hparams[name].number_value = float(value)
        else:
            start.hparams[name].string_value = str(value)
    data = HParamsPluginData(session_start_info=start, version=0)
    return _summary("session_start_info", data)


def session_end(succeeded: bool) -> Any:
    """That the run has ended, and how."""
    from tensorboardX.proto.api_pb2 import Status
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo

    status = Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
    end = SessionEndInfo(status=status, end_time_secs=time.time())
    return _summary("session_end_info", HParamsPluginData(session_end_info=end, version=0))


def _type_of(value: Any) -> int:
    from tensorboardX.proto.api_pb2 import DataType

    if isinstance(value, bool):
        return DataType.Value("DATA_TYPE_BOOL")
    if isinstance(value, (int, float)):
        return DataType.Value("DATA_TYPE_FLOAT64")
    return DataType.Value("DATA_TYPE_STRING")


def _summary(name: str, data: Any) -> Any:
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN, content=data.SerializeToString())
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=f"_hparams_/{name}", metadata=metadata)])
