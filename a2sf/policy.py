"""The place that configurations written before 0.2 name as `_target_`."""

from a2sf.policies.a2sf import A2SF as A2SF
from a2sf.policies.base import Policy as Policy
from a2sf.policies.base import Retention as Retention
