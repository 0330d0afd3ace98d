// SPDX-License-Identifier: Apache-2.0

package runtimetest

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// script is one process of a Fake. It knows a small part of sh:
//
//	echo WORD... [>&2]     printf TEXT       exit N        true, false
//	sleep SECONDS          cat               stty size     pwd
//	trap 'exit N' TERM     CMD & wait        oom
//
// with ; between commands, quotes, and $NAME from the environment. cat copies
// stdin to stdout. oom ends the process as the kernel would for want of memory.
type script struct {
	args  []string
	env   []string
	dir   string
	first bool // PID 1 of its namespace: signals without a handler do nothing
	stdin io.Reader
	out   func(stderr bool, p []byte)
	size  func() (rows, cols uint32)

	signals chan syscall.Signal // depth 16: more at once are as one
	mu      sync.Mutex
	traps   map[syscall.Signal]uint32
	oom     bool
}

// programs that a script can begin with.
var programs = map[string]bool{
	"sh": true, "/bin/sh": true, "echo": true, "printf": true, "exit": true, "true": true, "false": true, "sleep": true,
	"cat": true, "stty": true, "pwd": true, "env": true, "oom": true,
}

// ended carries an exit code out of a script.
type ended struct{ code uint32 }

// run runs to the end and answers the exit code.
func (s *script) run() (code uint32) {
	defer func() {
		if e := recover(); e != nil {
			end, ok := e.(ended)
			if !ok {
				panic(e)
			}
			code = end.code
		}
	}()
	if len(s.args) >= 3 && (s.args[0] == "sh" || s.args[0] == "/bin/sh") && s.args[1] == "-c" {
		for _, cmd := range splitCommands(s.args[2]) {
			code = s.command(s.words(cmd))
		}
		return code
	}
	return s.command(s.args)
}

func (s *script) command(words []string) uint32 {
	stderr := false
	if n := len(words); n > 0 && words[n-1] == ">&2" {
		stderr, words = true, words[:n-1]
	}
	if n := len(words); n > 1 && words[n-2] == "&" && words[n-1] == "wait" {
		words = words[:n-2]
	}
	if len(words) == 0 {
		return 0
	}
	switch rest := words[1:]; words[0] {
	case "echo":
		s.out(stderr, []byte(strings.Join(rest, " ")+"\n"))
	case "printf":
		s.out(stderr, []byte(strings.ReplaceAll(strings.Join(rest, " "), `\n`, "\n")))
	case "exit":
		n, _ := strconv.ParseUint(first(rest), 10, 8)
		panic(ended{uint32(n)})
	case "false":
		return 1
	case "sleep":
		d, _ := strconv.ParseFloat(first(rest), 64)
		s.pause(time.After(time.Duration(d * float64(time.Second))))
	case "cat":
		s.cat()
	case "pwd":
		s.out(stderr, []byte(s.dir+"\n"))
	case "env":
		s.out(stderr, []byte(strings.Join(s.env, "\n")+"\n"))
	case "stty":
		rows, cols := s.size()
		s.out(stderr, fmt.Appendf(nil, "%d %d\n", rows, cols))
	case "trap":
		n, _ := strconv.ParseUint(strings.TrimPrefix(first(rest), "exit "), 10, 8)
		s.mu.Lock()
		s.traps[syscall.SIGTERM] = uint32(n)
		s.mu.Unlock()
	case "oom":
		s.mu.Lock()
		s.oom = true
		s.mu.Unlock()
		panic(ended{128 + uint32(syscall.SIGKILL)})
	case "sh", "/bin/sh":
		s.cat() // an interactive shell that takes its input for output
	}
	return 0
}

func first(words []string) string {
	if len(words) == 0 {
		return ""
	}
	return words[0]
}

// cat copies stdin to stdout until it ends or a signal does.
func (s *script) cat() {
	if s.stdin == nil {
		return
	}
	done := make(chan time.Time)
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			n, err := s.stdin.Read(buf)
			if n > 0 {
				s.out(false, buf[:n])
			}
			if err != nil {
				return
			}
		}
	}()
	s.pause(done)
}

// pause waits; a signal may end the process meanwhile.
func (s *script) pause(until <-chan time.Time) {
	for {
		select {
		case <-until:
			return
		case sig := <-s.signals:
			s.mu.Lock()
			code, trapped := s.traps[sig]
			s.mu.Unlock()
			switch {
			case sig == syscall.SIGKILL:
				panic(ended{128 + uint32(sig)})
			case trapped:
				panic(ended{code})
			case s.first || sig == syscall.SIGWINCH:
			default:
				panic(ended{128 + uint32(sig)})
			}
		}
	}
}

// splitCommands splits at ; outside quotes.
func splitCommands(script string) []string {
	var out []string
	var quote rune
	at := 0
	for i, c := range script {
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '\'' || c == '"':
			quote = c
		case c == ';':
			out = append(out, script[at:i])
			at = i + 1
		}
	}
	return append(out, script[at:])
}

// words splits a command, takes quotes away and puts variables in.
func (s *script) words(cmd string) []string {
	var (
		out   []string
		word  strings.Builder
		has   bool
		quote byte
	)
	for i := 0; i < len(cmd); i++ {
		c := cmd[i]
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '\'' || c == '"'):
			quote, has = c, true
		case quote == 0 && c == ' ':
			if has {
				out = append(out, word.String())
			}
			word.Reset()
			has = false
		case quote != '\'' && c == '$':
			name := ""
			for i+1 < len(cmd) && (cmd[i+1] == '_' || cmd[i+1] >= 'A' && cmd[i+1] <= 'Z') {
				i++
				name += string(cmd[i])
			}
			for _, kv := range s.env {
				if k, v, _ := strings.Cut(kv, "="); k == name {
					word.WriteString(v)
				}
			}
			has = true
		default:
			word.WriteByte(c)
			has = true
		}
	}
	if has {
		out = append(out, word.String())
	}
	return out
}
