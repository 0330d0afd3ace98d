// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// row is one result, as it stands in bench.json.
type row struct {
	Bench   string  `json:"bench"`
	Name    string  `json:"name"`
	Value   float64 `json:"value"`
	Unit    string  `json:"unit"`
	Ratio   float64 `json:"ratio,omitempty"`    // of Value to that of Against
	Against string  `json:"against,omitempty"`  //
	Limit   float64 `json:"limit,omitempty"`    // 0: for information only
	LimitOn string  `json:"limit_on,omitempty"` // "value" or "ratio"
	Better  string  `json:"better"`             // "lower" or "higher"
	OK      bool    `json:"ok"`

	spread series // behind Value, for the table
	peer   series // behind what Ratio compares with
}

func (r *row) judge() {
	r.OK = true
	got := r.Value
	if r.LimitOn == "ratio" {
		got = r.Ratio
	}
	switch {
	case r.Limit == 0:
	case got == 0: // not measured
		r.OK = false
	case r.Better == "higher":
		r.OK = got >= r.Limit
	default:
		r.OK = got <= r.Limit
	}
}

// report collects rows, prints them and keeps them.
type report struct {
	root  string
	file  string
	out   io.Writer
	group string
	rows  []row
	ok    bool

	mu      sync.Mutex
	closing func() error // +checklocks:mu; takes away what runs; nil if nothing does
}

// atEnd registers what takes away what a group has set up. It runs once: by the
// function that atEnd answers, or by interrupt.
func (rep *report) atEnd(f func() error) func() error {
	once := sync.OnceValue(f)
	rep.mu.Lock()
	defer rep.mu.Unlock()
	rep.closing = once
	return once
}

// interrupt takes away what the running group has set up.
func (rep *report) interrupt() error {
	rep.mu.Lock()
	defer rep.mu.Unlock()
	if rep.closing == nil {
		return nil
	}
	return rep.closing()
}

func (rep *report) header() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	model := "unknown CPU"
	for line := range strings.Lines(string(cpuinfo)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			model = strings.TrimSpace(v)
			break
		}
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	fmt.Fprintf(rep.out, "%s\nLinux %s, %s, %d cores, load %s\nmitigations: %s\n",
		time.Now().UTC().Format(time.RFC3339), unix.ByteSliceToString(u.Release[:]), model, runtime.NumCPU(),
		strings.Join(strings.Fields(string(load))[:3], " "), mitigations())
	return nil
}

// mitigations answers what slows down the way into the kernel on this machine.
func mitigations() string {
	files, _ := filepath.Glob("/sys/devices/system/cpu/vulnerabilities/*")
	var on []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		text := strings.TrimSpace(string(b))
		if err == nil && text != "Not affected" {
			on = append(on, filepath.Base(f)+": "+text)
		}
	}
	if len(on) == 0 {
		return "none needed"
	}
	return strings.Join(on, "; ")
}

func (rep *report) begin(group string) { rep.group, rep.rows = group, nil }

func (rep *report) add(r row) {
	r.judge()
	rep.ok = rep.ok && r.OK
	r.Value, r.Ratio = math.Round(r.Value*1e4)/1e4, math.Round(r.Ratio*1e4)/1e4
	rep.rows = append(rep.rows, r)
}

// end prints the group and puts it into the file in place of its old rows.
func (rep *report) end(took time.Duration) error {
	fmt.Fprintf(rep.out, "\n%s (%.0f s)\n", rep.group, took.Seconds())
	w := tabwriter.NewWriter(rep.out, 2, 0, 2, ' ', 0)
	fmt.Fprintln(w, "  NAME\tVALUE\tSPREAD\tN\tRATIO\tPEER\tLIMIT\t")
	for _, r := range rep.rows {
		spread, n, ratio, peer, limit := "", "", "", r.Against, ""
		if len(r.spread) > 0 {
			spread = fmt.Sprintf("%s-%s", number(r.spread.percentile(10)), number(r.spread.percentile(90)))
			n = fmt.Sprint(len(r.spread))
		}
		if r.Ratio != 0 {
			ratio = fmt.Sprintf("%.3f", r.Ratio)
		}
		if len(r.peer) > 0 {
			peer = fmt.Sprintf("%s (%s-%s) %s", number(r.peer.p50()), number(r.peer.percentile(10)), number(r.peer.percentile(90)), r.Against)
		}
		if r.Limit != 0 {
			verdict := "ok"
			if !r.OK {
				verdict = "NOT MET"
			}
			sign := "<="
			if r.Better == "higher" {
				sign = ">="
			}
			limit = fmt.Sprintf("%s %s %s: %s", r.LimitOn, sign, number(r.Limit), verdict)
		}
		fmt.Fprintf(w, "  %s\t%s %s\t%s\t%s\t%s\t%s\t%s\t\n", r.Name, number(r.Value), r.Unit, spread, n, ratio, peer, limit)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return rep.save()
}

// number with as many digits as mean something.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 1000:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func (rep *report) save() error {
	var all []row
	old, err := os.ReadFile(rep.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(old, &all); err != nil {
			return fmt.Errorf("read %s: %w; remove it", rep.file, err)
		}
	}
	all = slices.DeleteFunc(all, func(r row) bool { return r.Bench == rep.group })
	all = append(all, rep.rows...)
	rank := func(name string) int {
		for i, g := range groups {
			if g.name == name {
				return i
			}
		}
		return len(groups)
	}
	slices.SortStableFunc(all, func(a, b row) int { return rank(a.Bench) - rank(b.Bench) })
	text := []byte("[\n")
	for i, r := range all {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		text = append(append(text, "  "...), line...)
		if i < len(all)-1 {
			text = append(text, ',')
		}
		text = append(text, '\n')
	}
	if err := os.MkdirAll(filepath.Dir(rep.file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(rep.file, append(text, "]\n"...), 0o644)
}
