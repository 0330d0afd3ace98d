// SPDX-License-Identifier: Apache-2.0

package budget

import (
	"testing"
	"time"

	"github.com/bulkheadhq/bulkhead/netpol"
)

func at(t *testing.T, s string) time.Time {
	t.Helper()
	v, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestWindows(t *testing.T) {
	for _, c := range []struct {
		per            netpol.Window
		now, from, end string
	}{
		{netpol.PerHour, "2026-11-25T03:59:59.999999999Z", "2026-11-25T03:00:00Z", "2026-11-25T04:00:00Z"},
		{netpol.PerHour, "2026-11-25T04:00:00Z", "2026-11-25T04:00:00Z", "2026-11-25T05:00:00Z"},
		{netpol.PerHour, "2026-12-31T23:30:00Z", "2026-12-31T23:00:00Z", "2027-01-01T00:00:00Z"},
		{netpol.PerHour, "2026-11-25T05:15:00+05:30", "2026-11-24T23:00:00Z", "2026-11-25T00:00:00Z"},
		{netpol.PerDay, "2026-11-25T23:59:59Z", "2026-11-25T00:00:00Z", "2026-11-26T00:00:00Z"},
		{netpol.PerDay, "2026-11-25T00:30:00+01:00", "2026-11-24T00:00:00Z", "2026-11-25T00:00:00Z"},
		{netpol.PerDay, "2028-02-28T12:00:00Z", "2028-02-28T00:00:00Z", "2028-02-29T00:00:00Z"},
		{netpol.PerDay, "2027-02-28T12:00:00Z", "2027-02-28T00:00:00Z", "2027-03-01T00:00:00Z"},
		{netpol.PerDay, "2026-12-31T12:00:00Z", "2026-12-31T00:00:00Z", "2027-01-01T00:00:00Z"},
		{netpol.PerMonth, "2026-01-31T23:59:59Z", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"},
		{netpol.PerMonth, "2026-02-01T00:00:00Z", "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"},
		{netpol.PerMonth, "2028-02-29T23:59:59Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"},
		{netpol.PerMonth, "2100-02-28T23:59:59Z", "2100-02-01T00:00:00Z", "2100-03-01T00:00:00Z"}, // no leap year
		{netpol.PerMonth, "2026-04-30T12:00:00Z", "2026-04-01T00:00:00Z", "2026-05-01T00:00:00Z"},
		{netpol.PerMonth, "2026-12-31T23:59:59Z", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"},
		{netpol.PerMonth, "1960-06-01T00:00:00Z", "1970-01-01T00:00:00Z", "1970-02-01T00:00:00Z"}, // a clock that was never set
	} {
		from := Start(c.per, at(t, c.now))
		if want := uint64(at(t, c.from).Unix()); from != want {
			t.Errorf("per %s at %s: began at %s, want %s", c.per, c.now, time.Unix(int64(from), 0).UTC(), c.from)
		}
		if end := End(c.per, from); !end.Equal(at(t, c.end)) {
			t.Errorf("per %s at %s: ends at %s, want %s", c.per, c.now, end, c.end)
		}
	}
}

// TestWindowsFollowEachOther: over five years, which hold a leap day, every
// window ends where the next begins, and months have the calendar's lengths.
func TestWindowsFollowEachOther(t *testing.T) {
	first := at(t, "2026-01-01T00:00:00Z")
	for _, per := range []netpol.Window{netpol.PerHour, netpol.PerDay, netpol.PerMonth} {
		start := Start(per, first)
		n := 0
		for end := End(per, start); end.Year() < 2031; end = End(per, start) {
			if got := Start(per, end.Add(-time.Nanosecond)); got != start {
				t.Fatalf("per %s: the last moment before %s is of %d, want %d", per, end, got, start)
			}
			if start = Start(per, end); int64(start) != end.Unix() {
				t.Fatalf("per %s: the window after %s begins at %d", per, end, start)
			}
			n++
		}
		days := 5*365 + 1
		if want := map[netpol.Window]int{netpol.PerHour: 24*days - 1, netpol.PerDay: days - 1, netpol.PerMonth: 59}[per]; n != want {
			t.Errorf("per %s: %d windows ended in five years, want %d", per, n, want)
		}
	}
}

// TestEndOfWindows: at the ends of days, months and years.
func TestEndOfWindows(t *testing.T) {
	for _, c := range []struct {
		start string
		per   netpol.Window
		want  string
	}{
		{"2026-11-02T10:00:00Z", netpol.PerHour, "2026-11-02T11:00:00Z"},
		{"2026-12-31T23:00:00Z", netpol.PerHour, "2027-01-01T00:00:00Z"},
		{"2028-02-28T00:00:00Z", netpol.PerDay, "2028-02-29T00:00:00Z"},
		{"2026-02-01T00:00:00Z", netpol.PerMonth, "2026-03-01T00:00:00Z"},
		{"2026-12-01T00:00:00Z", netpol.PerMonth, "2027-01-01T00:00:00Z"},
	} {
		if got := End(c.per, uint64(at(t, c.start).Unix())); !got.Equal(at(t, c.want)) {
			t.Errorf("the %s from %s ends at %s, want %s", c.per, c.start, got, c.want)
		}
	}
}
