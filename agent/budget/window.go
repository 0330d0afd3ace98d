// SPDX-License-Identifier: Apache-2.0

package budget

import (
	"fmt"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// Start answers when the window that holds t began, in seconds since 1970. All
// windows are of the UTC calendar: a month is as long as it is.
func Start(per netpol.Window, t time.Time) uint64 {
	t = t.UTC()
	var start time.Time
	switch per {
	case netpol.PerHour:
		start = t.Truncate(time.Hour)
	case netpol.PerDay:
		start = time.Date(t.Year(), t.Month(), t.Day(), 0, 0, 0, 0, time.UTC)
	case netpol.PerMonth:
		start = time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC)
	default:
		panic(fmt.Sprintf("budget: %s is no window", per)) // the parser knows three
	}
	return uint64(max(start.Unix(), 0))
}

// End answers when a window ends that began at start, and the next begins. For
// a start that is none, it is the end of the window that holds it.
func End(per netpol.Window, start uint64) time.Time {
	t := time.Unix(int64(start), 0).UTC()
	switch per {
	case netpol.PerHour:
		return t.Truncate(time.Hour).Add(time.Hour)
	case netpol.PerDay:
		return time.Date(t.Year(), t.Month(), t.Day()+1, 0, 0, 0, 0, time.UTC)
	}
	return time.Date(t.Year(), t.Month()+1, 1, 0, 0, 0, 0, time.UTC)
}
