// SPDX-License-Identifier: Apache-2.0

package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Stall is how long processes waited for a resource.
type Stall struct {
	SomeUsec, FullUsec   uint64  // in all: at least one waited; all waited
	SomeAvg10, FullAvg10 float64 // percent of the last ten seconds
}

// Pressure of a sandbox; nil where the kernel does not tell.
type Pressure struct{ CPU, Memory, IO *Stall }

// Pressure reads how long a sandbox waited for CPU, memory and disk. The
// error wraps fs.ErrNotExist if there is no leaf on cgroup v2.
func (t *Tree) Pressure(tenant, id string) (Pressure, error) {
	dir, err := leafDir(tenant, id)
	if err != nil {
		return Pressure{}, err
	}
	node := filepath.Join(t.v2, dir)
	// Pressure is not a controller: it is read where the leaf is.
	if _, err := readKeys(filepath.Join(node, "cgroup.events")); err != nil {
		return Pressure{}, fmt.Errorf("read pressure of %s: %w", id, err)
	}
	var p Pressure
	for file, to := range map[string]**Stall{"cpu.pressure": &p.CPU, "memory.pressure": &p.Memory, "io.pressure": &p.IO} {
		text, err := readText(filepath.Join(node, file))
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, fs.ErrNotExist) {
			continue // psi=0, or a kernel without it
		}
		if err != nil {
			return Pressure{}, fmt.Errorf("read pressure of %s: %w", id, err)
		}
		s, err := parsePressure(text)
		if err != nil {
			return Pressure{}, fmt.Errorf("read %s of %s: %w", file, id, err)
		}
		*to = &s
	}
	return p, nil
}

// parsePressure reads lines such as
//
//	some avg10=0.00 avg60=0.00 avg300=0.00 total=0
//
// "full" may lack, as it does for the CPU before Linux 5.13.
func parsePressure(text string) (Stall, error) {
	var s Stall
	some := false
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		var avg *float64
		var total *uint64
		switch f[0] {
		case "some":
			avg, total, some = &s.SomeAvg10, &s.SomeUsec, true
		case "full":
			avg, total = &s.FullAvg10, &s.FullUsec
		default:
			continue
		}
		found := 0
		for _, kv := range f[1:] {
			key, value, _ := strings.Cut(kv, "=")
			var err error
			switch key {
			case "avg10":
				*avg, err = strconv.ParseFloat(value, 64)
				if err == nil && !(*avg >= 0 && *avg <= 1e9) {
					err = fmt.Errorf("%q is no percentage", value)
				}
				found++
			case "total":
				*total, err = strconv.ParseUint(value, 10, 64)
				found++
			}
			if err != nil {
				return Stall{}, err
			}
		}
		if found != 2 {
			return Stall{}, fmt.Errorf("line %q lacks avg10 or total", line)
		}
	}
	if !some {
		return Stall{}, errors.New("no line \"some\"")
	}
	return s, nil
}
