"""The domains of the general family, by name."""

from dsv32_jax.agents.synthesis.general.domains.goods import (
  FLEET_ROUTING,
  INSURANCE_CLAIMS,
  LIBRARY_LOANS,
  WAREHOUSE_ORDERS,
)
from dsv32_jax.agents.synthesis.general.domains.meals import (
  EVENT_CATERING,
  RECIPE_PLANNING,
)
from dsv32_jax.agents.synthesis.general.domains.projects import (
  SOFTWARE_RELEASES,
  SPORTS_LEAGUE,
)
from dsv32_jax.agents.synthesis.general.domains.schedules import (
  CLINIC_APPOINTMENTS,
  CONFERENCE_ROOMS,
  COURSE_TIMETABLE,
)
from dsv32_jax.agents.synthesis.general.domains.trip_planning import (
  TRIP_PLANNING,
)

DOMAINS = {
  domain.name: domain
  for domain in (
    TRIP_PLANNING,
    COURSE_TIMETABLE,
    WAREHOUSE_ORDERS,
    CLINIC_APPOINTMENTS,
    EVENT_CATERING,
    LIBRARY_LOANS,
    FLEET_ROUTING,
    CONFERENCE_ROOMS,
    RECIPE_PLANNING,
    SPORTS_LEAGUE,
    SOFTWARE_RELEASES,
    INSURANCE_CLAIMS,
  )
}
"""Twelve; environments take them in turn."""
