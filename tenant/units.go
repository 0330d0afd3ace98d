// SPDX-License-Identifier: Apache-2.0

package tenant

import (
	"fmt"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// ParseSize reads a number of bytes, as netpol.ParseSize does.
func ParseSize(s string) (int64, error) { return netpol.ParseSize(s) }

// ParseCPU reads a share of CPUs in thousandths: 4, 0.5 or 500m. Anything
// finer than a thousandth is refused. What zero means is the caller's to say.
func ParseCPU(s string) (millis int64, err error) {
	number, unit := netpol.SplitUnit(s)
	var factor int64
	switch unit {
	case "":
		factor = 1000
	case "m":
		factor = 1
	default:
		return 0, fmt.Errorf("cpu %q: write a number of CPUs, as in 2 or 0.5, or thousandths, as in 500m", clip(s))
	}
	millis, err = netpol.Scale(number, factor)
	if err != nil {
		return 0, fmt.Errorf("cpu %q: %w", clip(s), err)
	}
	return millis, nil
}

// clip shortens what somebody wrote before it goes into a message.
func clip(s string) string {
	if r := []rune(s); len(r) > 60 {
		return string(r[:60]) + "..."
	}
	return s
}
