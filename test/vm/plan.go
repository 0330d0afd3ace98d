// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strconv"
	"strings"
	"time"
)

// plan is what the guest is to do; it travels as JSON in the initial RAM disk.
type plan struct {
	Nonce  string // of the result line, so that no test's output can pass for it
	Mode   mode
	Kernel string // version
	Repo   string // absolute, the same in the guest
	Self   string // this program in the guest's root
	Path   string // the host's PATH
	Steps  []planStep
}

type planStep struct {
	Name  string
	Path  string
	Args  []string
	Dir   string
	Test  bool // filter the output of a test binary
	Limit time.Duration
}

// Lines that the guest prints for the host.
const (
	upLine       = "bulkhead-vm: up"
	resultPrefix = "bulkhead-vm: result "
)

func resultLine(nonce string, code int) string {
	return resultPrefix + nonce + " " + strconv.Itoa(code)
}

// parseResult answers the exit code that a console line carries, if it is the
// result line of this boot. A kernel message may have come before it.
func parseResult(line, nonce string) (code int, ok bool) {
	_, rest, found := strings.Cut(strings.TrimRight(line, "\r\n"), resultPrefix+nonce+" ")
	if !found {
		return 0, false
	}
	code, err := strconv.Atoi(rest)
	return code, err == nil
}
